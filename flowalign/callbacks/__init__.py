"""What accompanies training: checkpoints, pictures, diagnostics."""
