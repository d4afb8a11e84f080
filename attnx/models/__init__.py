"""Loading of models by name, with their weights and image preparation."""
