"""Tasks: how a teacher is asked, what of its answer is learned, and when an answer is right. One small file each."""
