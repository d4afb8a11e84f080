"""Interactive pages in HTML: one image (`explore`), a caption (`words`), the maps of a job (`browse`)."""
