"""Operators of the LSTM with layer normalisation."""
