"""What tools print and draw."""
