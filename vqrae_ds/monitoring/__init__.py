"""What a run shows and measures of itself: the log, TensorBoard, throughput, traces."""
