"""The LSTM operators: one layer in one or two directions, over the extension or torch's own functions."""
