"""What runs the networks of a bundle; `base` is the interface, one module an engine."""
