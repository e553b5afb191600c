"""A classifier over streamed features: is this editor a robot?"""
