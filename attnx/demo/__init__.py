"""The bundled demo: a small vision transformer trained on drawn scenes."""
