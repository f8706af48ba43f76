"""One dictionary trained by many workers: latents split over shards, batches over replicas (see ../SCALING.md)."""
