"""Accuracy on real data: tasks × methods × learning rates × batch sizes × seeds, and what they decide."""
