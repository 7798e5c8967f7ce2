"""`kvstrata notebooks`: execute the notebooks in place."""


def command() -> None:
    """Execute every notebook under notebooks/ and save it with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    from hw.flow.cache import ROOT, write_atomically
    from sw_stack.cli.output import track

    for path in track(sorted((ROOT / "notebooks").glob("*.ipynb")), "Notebooks"):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
        for cell in notebook.cells:
            cell.get("metadata", {}).pop("execution", None)
        write_atomically(path, nbformat.writes(notebook) + "\n")
