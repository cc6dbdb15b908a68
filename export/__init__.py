"""From a trained checkpoint to the ONNX files of a bundle."""
