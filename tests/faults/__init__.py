"""Every fault that the design promises to survive, on real servers, under a load whose every answer is judged."""
