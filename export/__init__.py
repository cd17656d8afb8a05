"""PyTorch models, training, evaluation and ONNX export; none of it is needed at run time."""
