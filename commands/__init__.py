"""What the command ``fulgurite`` does; above all other packages, since it tries them together."""
