"""The main job, ``python -m fastattn demo``: real sentences through a real BERT, patched and not, and the profile."""
