"""NAND flash controller side of the in-storage unit: page filter per channel and restoration of page order."""
