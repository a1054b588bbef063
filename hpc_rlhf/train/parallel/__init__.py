"""Models split over ranks, and the one file with DeepSpeed's private names."""
