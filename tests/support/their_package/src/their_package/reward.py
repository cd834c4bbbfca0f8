def score(images, prompts):
    """Mean red, as a list: an algorithm without the reward's gradient takes it."""
    return [float(value) for value in images[:, 0].mean((1, 2))]
