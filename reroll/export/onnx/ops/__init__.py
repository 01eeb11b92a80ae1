"""Lower the ops of a graph to ONNX operators."""
