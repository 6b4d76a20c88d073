"""What prediction needs beside the model: tiles, videos, cameras and point clouds."""
