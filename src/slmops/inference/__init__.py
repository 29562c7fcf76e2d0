"""Running models: one interface over transformers and ONNX Runtime GenAI."""
