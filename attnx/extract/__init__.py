"""From images (and captions) to maps in one call: `Extractor`, `class_maps`, `word_maps`, `gradcam`.

An `Extractor` runs a `trial` pass, makes a `plan` from it, and from then on runs only what the method reads.
"""
