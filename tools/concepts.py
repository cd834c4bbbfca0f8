"""The concepts of the embedded model: its word for each, and Unicode's names of the emoji that draw it.

Chosen for being told apart at 64 pixels, for a one-word name, and for existing in all four styles. Several emoji of one
concept are several drawings of it; line drawings of another maker are found by the concept's own name.
"""

from __future__ import annotations

_TABLE = """
animals
dog: dog face, dog | cat: cat face, cat | fox: fox | lion: lion | tiger: tiger face, tiger | horse: horse face, horse
unicorn: unicorn | cow: cow face, cow | pig: pig face, pig | sheep: ewe | mouse: mouse face, mouse
rabbit: rabbit face, rabbit | hamster: hamster | squirrel: chipmunk | bear: bear | panda: panda | koala: koala
raccoon: raccoon | wolf: wolf | frog: frog | monkey: monkey face, monkey | elephant: elephant | rhino: rhinoceros
giraffe: giraffe | zebra: zebra | deer: deer | camel: camel, two-hump camel | hedgehog: hedgehog | bat: bat
penguin: penguin | owl: owl | swan: swan | duck: duck | chicken: chicken | chick: baby chick, front-facing baby chick
bird: bird | flamingo: flamingo | peacock: peacock | parrot: parrot | turtle: turtle | snake: snake
crocodile: crocodile | dragon: dragon face, dragon | dinosaur: T-Rex, sauropod | whale: spouting whale, whale
dolphin: dolphin | fish: fish, tropical fish | shark: shark | octopus: octopus | crab: crab | snail: snail
butterfly: butterfly | bee: honeybee | ladybug: lady beetle | spider: spider | scorpion: scorpion

plants
rose: rose | sunflower: sunflower | tulip: tulip | cactus: cactus | palm: palm tree | fir: evergreen tree
mushroom: mushroom | clover: four leaf clover | seedling: seedling | daisy: blossom
maple: maple leaf

food
grapes: grapes | watermelon: watermelon | tangerine: tangerine | lemon: lemon | banana: banana | pineapple: pineapple
apple: red apple, green apple | pear: pear | peach: peach | cherry: cherries | strawberry: strawberry
kiwi: kiwi fruit | tomato: tomato | avocado: avocado | eggplant: eggplant | carrot: carrot | corn: ear of corn
pepper: bell pepper | broccoli: broccoli | bread: bread | croissant: croissant | pretzel: pretzel
cheese: cheese wedge | burger: hamburger | fries: french fries | pizza: pizza | hotdog: hot dog | sandwich: sandwich
taco: taco | egg: egg | popcorn: popcorn | sushi: sushi | icecream: soft ice cream, ice cream | donut: doughnut
cookie: cookie | cake: birthday cake | cupcake: cupcake | chocolate: chocolate bar | candy: candy | lollipop: lollipop
coffee: hot beverage | teapot: teapot | beer: beer mug

vehicles
car: automobile, oncoming automobile | taxi: taxi, oncoming taxi | bus: bus, oncoming bus | truck: delivery truck
tractor: tractor | motorcycle: motorcycle | scooter: motor scooter | bicycle: bicycle | skateboard: skateboard
train: high-speed train | airplane: airplane | helicopter: helicopter | rocket: rocket | ufo: flying saucer
sailboat: sailboat | ship: ship

buildings
house: house, house with garden | castle: castle | tent: tent | church: church | factory: factory

weather
sun: sun, sun with face | moon: crescent moon, last quarter moon face | star: star, glowing star
planet: ringed planet | cloud: cloud | rainbow: rainbow | lightning: high voltage | snowflake: snowflake
snowman: snowman without snow | fire: fire | volcano: volcano | mountain: snow-capped mountain

faces
smiley: grinning face with big eyes, smiling face with smiling eyes | robot: robot | ghost: ghost | alien: alien
skull: skull | clown: clown face | poo: pile of poo | cowboy: cowboy hat face

things
balloon: balloon | gift: wrapped gift | trophy: trophy | soccer: soccer ball | basketball: basketball | dice: game die
teddy: teddy bear | kite: kite | gamepad: video game | palette: artist palette | pumpkin: jack-o-lantern
glasses: glasses, sunglasses | shirt: t-shirt | dress: dress | backpack: backpack | sneaker: running shoe
crown: crown | hat: top hat | ring: ring | gem: gem stone | umbrella: umbrella, umbrella with rain drops
heart: red heart | bell: bell | microphone: microphone | headphones: headphone
trumpet: trumpet | guitar: guitar | violin: violin | drum: drum | phone: mobile phone | laptop: laptop
television: television | camera: camera, camera with flash | candle: candle | bulb: light bulb
book: closed book, open book | envelope: envelope | pencil: pencil | scissors: scissors
lock: locked | key: key, old key | hammer: hammer | axe: axe | bomb: bomb | shield: shield | wrench: wrench
gear: gear | magnet: magnet | ladder: ladder | microscope: microscope | door: door | bed: bed | sofa: couch and lamp
chair: chair | clock: alarm clock, mantelpiece clock | hourglass: hourglass done | watch: watch | anchor: anchor
globe: globe showing Americas, globe showing Europe-Africa
"""

CONCEPTS: dict[str, list[str]] = {
    word: names.split(", ")
    for line in _TABLE.splitlines()
    if ":" in line
    for word, names in (pair.split(": ") for pair in line.split(" | "))
}
