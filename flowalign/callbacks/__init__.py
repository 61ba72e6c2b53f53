"""Lightning callbacks: progress, images, checkpoints, preemption, profiling and monitoring."""
