"""Models as files for elsewhere: ONNX, torch.export, AOTInductor, TorchScript, OpenVINO, ExecuTorch, plain torch."""
