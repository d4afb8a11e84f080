"""Pictures of maps: `picture` draws, the other modules compose what the commands write."""
