"""A small procedural world of furnished rooms with exact depth; tools/render_rooms.py writes it to disk.

Reading order: camera, solids, textures, furniture, interior, photo.

World frame: x and y along the walls, z up, origin in a corner of the floor, metres. Camera frame: x right,
y down, z forward. Arrays of vectors have the coordinate as their first axis, `[3, ...]`.
"""
