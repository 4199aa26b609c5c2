"""Objects followed through a video from clicks and boxes."""
