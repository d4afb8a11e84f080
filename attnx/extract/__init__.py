"""Maps of images, or of images and captions, in one call: `Extractor`, `class_maps`, `word_maps`, `gradcam`.

An `Extractor` runs a `trial` pass and makes a `plan` from it. Later calls run only what the method reads.
"""
