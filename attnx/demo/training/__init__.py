"""Training of the bundled models: `python -m attnx.demo.training.vit` and `python -m attnx.demo.training.albef`."""
