"""Host software that writes text: sessions on a device, placements, lockstep."""
