"""The concepts of the embedded model: its name for each, and Unicode's name for the emoji that draws it.

Chosen for being told apart at 64 pixels, for a one-word name, and for existing in all four styles.
"""

CONCEPTS = {
    # animals
    "dog": "dog face", "cat": "cat face", "fox": "fox", "lion": "lion", "tiger": "tiger face", "horse": "horse face",
    "unicorn": "unicorn", "cow": "cow face", "pig": "pig face", "mouse": "mouse face", "rabbit": "rabbit face",
    "hamster": "hamster", "bear": "bear", "panda": "panda", "koala": "koala", "wolf": "wolf", "frog": "frog",
    "monkey": "monkey face", "elephant": "elephant", "giraffe": "giraffe", "zebra": "zebra", "camel": "camel",
    "hedgehog": "hedgehog", "bat": "bat", "penguin": "penguin", "owl": "owl", "duck": "duck", "chicken": "chicken",
    "chick": "baby chick", "flamingo": "flamingo", "parrot": "parrot", "turtle": "turtle", "snake": "snake",
    "crocodile": "crocodile", "whale": "spouting whale", "dolphin": "dolphin", "fish": "fish", "shark": "shark",
    "octopus": "octopus", "crab": "crab", "snail": "snail", "butterfly": "butterfly", "bee": "honeybee",
    "ladybug": "lady beetle",
    # plants
    "rose": "rose", "sunflower": "sunflower", "tulip": "tulip", "cactus": "cactus", "palm": "palm tree",
    "fir": "evergreen tree", "mushroom": "mushroom", "clover": "four leaf clover",
    # food
    "grapes": "grapes", "watermelon": "watermelon", "tangerine": "tangerine", "lemon": "lemon", "banana": "banana",
    "pineapple": "pineapple", "apple": "red apple", "pear": "pear", "peach": "peach", "cherry": "cherries",
    "strawberry": "strawberry", "kiwi": "kiwi fruit", "tomato": "tomato", "avocado": "avocado",
    "eggplant": "eggplant", "carrot": "carrot", "corn": "ear of corn", "broccoli": "broccoli", "bread": "bread",
    "croissant": "croissant", "pretzel": "pretzel", "cheese": "cheese wedge", "burger": "hamburger",
    "fries": "french fries", "pizza": "pizza", "hotdog": "hot dog", "sushi": "sushi", "donut": "doughnut",
    "cookie": "cookie", "cake": "birthday cake", "cupcake": "cupcake", "lollipop": "lollipop",
    # things
    "rocket": "rocket", "car": "automobile", "sailboat": "sailboat", "house": "house", "balloon": "balloon",
    "gift": "wrapped gift", "trophy": "trophy", "guitar": "guitar", "drum": "drum", "crown": "crown",
    "umbrella": "umbrella", "key": "key", "bulb": "light bulb", "snowman": "snowman without snow", "star": "star",
    "teddy": "teddy bear", "pumpkin": "jack-o-lantern", "bell": "bell", "anchor": "anchor", "fire": "fire",
}
