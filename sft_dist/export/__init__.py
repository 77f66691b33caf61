"""`sft-dist export`: whatever a training leaves, as a plain model directory, tensor by tensor and without a network."""
