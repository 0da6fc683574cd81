"""Do activations move as much at any width and depth?"""
