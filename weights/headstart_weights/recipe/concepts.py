"""What the pictures show, as data: a caption noun -> an icon name in every icon set.

Icon names agree between the sets except for some of fxemoji's; a set that has neither name is left
out for that concept. Dashes and spaces do not matter.
"""

from __future__ import annotations

from typing import NamedTuple

FXEMOJI = "fxemoji"


class Concept(NamedTuple):
    """`name` as captions say it, `icon` as most sets call it, `in_fxemoji` as that one does."""

    name: str
    icon: str
    in_fxemoji: str

    def icon_in(self, vendor: str) -> str:
        return self.in_fxemoji if vendor == FXEMOJI else self.icon

    @staticmethod
    def parse(text: str) -> Concept:
        """`name`, `name=icon`, or either with `/icon of fxemoji` behind it."""
        common, _, in_fxemoji = text.partition("/")
        name, _, icon = common.partition("=")
        return Concept(name, icon or name, in_fxemoji or icon or name)


_TABLE = """
    fox/foxsmiling, cat=cat-face/cat, dog=dog-face/dog, panda/pandaface, koala,
    tiger=tiger-face/tiger, bear, rabbit=rabbit-face/bunny, frog, pig=pig-face/pig, cow=cow-face,
    monkey=monkey-face, mouse=mouse-face/mouse, hamster/hampster, lion, chicken,
    chick=hatching-chick, baby chick, owl, penguin, ladybug=lady-beetle, bee=honeybee, butterfly,
    turtle, octopus, fish=tropical-fish, whale=spouting-whale, snail, elephant, sunflower, tulip,
    rose, cherry blossom, hibiscus, daisy=blossom, cactus, palm tree, clover=four-leaf-clover,
    maple leaf, mushroom, apple=red-apple, strawberry, lemon, orange=tangerine, pear, peach,
    banana, pineapple, watermelon, tomato, carrot, doughnut, cookie, hamburger, birthday cake,
    ice cream=soft-ice-cream, lollipop, heart=red-heart, star, moon=crescent-moon,
    sun=sun-with-face, cloud, fire, snowman=snowman-without-snow, christmas tree,
    pumpkin=jack-o-lantern, ghost, alien, robot, rocket, balloon, crown, gem=gem-stone/gem, bell,
    gift=wrapped-gift/wrappedpresent, umbrella, house/housewithgarden, car=automobile, sailboat,
    soccer ball, light bulb, cup of coffee=hot-beverage
"""
CONCEPTS = tuple(Concept.parse(entry.strip()) for entry in _TABLE.split(","))

# Distinct at 64 px and present in four or more of the five sets; the others widen what the codec
# and the scorer are trained on.
PAIR_CONCEPTS: tuple[str, ...] = (
    *("fox", "cat", "dog", "panda", "koala", "tiger", "rabbit", "frog", "pig", "owl", "penguin"),
    *("ladybug", "sunflower", "tulip", "cherry blossom", "cactus", "mushroom", "apple"),
    *("strawberry", "lemon", "watermelon", "doughnut", "heart", "star", "balloon", "pumpkin"),
    *("ghost", "christmas tree"),
)
