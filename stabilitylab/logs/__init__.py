"""Read logs of other trainers as streams of numbers."""
