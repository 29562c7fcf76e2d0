"""Teachers behind one interface: transformers, ONNX Runtime GenAI, vLLM, any OpenAI-compatible endpoint."""
