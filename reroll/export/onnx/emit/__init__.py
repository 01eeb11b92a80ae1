"""Write a Program's graphs as ONNX files, with what describes and checks them."""
