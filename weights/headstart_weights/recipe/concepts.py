"""What the pictures show, as data: a caption noun -> an icon name in every icon set.

Icon names agree between the sets except where `Concept.other` says so; a set that has neither
name is left out for that concept.
"""

from __future__ import annotations

from typing import NamedTuple

FXEMOJI = "fxemoji"


class Concept(NamedTuple):
    """`name` as captions say it, `icon` as most sets call it, `other` where fxemoji differs."""

    name: str
    icon: str
    other: str | None = None

    def icon_in(self, vendor: str) -> str:
        return self.other if self.other is not None and vendor == FXEMOJI else self.icon


CONCEPTS: tuple[Concept, ...] = (
    Concept("fox", "fox", "foxsmiling"),
    Concept("cat", "cat-face", "cat"),
    Concept("dog", "dog-face", "dog"),
    Concept("panda", "panda", "pandaface"),
    Concept("koala", "koala"),
    Concept("tiger", "tiger-face", "tiger"),
    Concept("bear", "bear"),
    Concept("rabbit", "rabbit-face", "bunny"),
    Concept("frog", "frog"),
    Concept("pig", "pig-face", "pig"),
    Concept("cow", "cow-face", "cowface"),
    Concept("monkey", "monkey-face", "monkeyface"),
    Concept("mouse", "mouse-face", "mouse"),
    Concept("hamster", "hamster", "hampster"),
    Concept("lion", "lion"),
    Concept("chicken", "chicken"),
    Concept("chick", "hatching-chick", "hatchingchick"),
    Concept("baby chick", "baby-chick", "babychick"),
    Concept("owl", "owl"),
    Concept("penguin", "penguin"),
    Concept("ladybug", "lady-beetle", "ladybeetle"),
    Concept("bee", "honeybee"),
    Concept("butterfly", "butterfly"),
    Concept("turtle", "turtle"),
    Concept("octopus", "octopus"),
    Concept("fish", "tropical-fish", "tropicalfish"),
    Concept("whale", "spouting-whale", "spoutingwhale"),
    Concept("snail", "snail"),
    Concept("elephant", "elephant"),
    Concept("sunflower", "sunflower"),
    Concept("tulip", "tulip"),
    Concept("rose", "rose"),
    Concept("cherry blossom", "cherry-blossom", "cherryblossom"),
    Concept("hibiscus", "hibiscus"),
    Concept("daisy", "blossom"),
    Concept("cactus", "cactus"),
    Concept("palm tree", "palm-tree", "palmtree"),
    Concept("clover", "four-leaf-clover", "fourleafclover"),
    Concept("maple leaf", "maple-leaf", "mapleleaf"),
    Concept("mushroom", "mushroom"),
    Concept("apple", "red-apple", "redapple"),
    Concept("strawberry", "strawberry"),
    Concept("lemon", "lemon"),
    Concept("orange", "tangerine"),
    Concept("pear", "pear"),
    Concept("peach", "peach"),
    Concept("banana", "banana"),
    Concept("pineapple", "pineapple"),
    Concept("watermelon", "watermelon"),
    Concept("tomato", "tomato"),
    Concept("carrot", "carrot"),
    Concept("doughnut", "doughnut"),
    Concept("cookie", "cookie"),
    Concept("hamburger", "hamburger"),
    Concept("birthday cake", "birthday-cake", "birthdaycake"),
    Concept("ice cream", "soft-ice-cream", "softicecream"),
    Concept("lollipop", "lollipop"),
    Concept("heart", "red-heart", "redheart"),
    Concept("star", "star"),
    Concept("moon", "crescent-moon", "crescentmoon"),
    Concept("sun", "sun-with-face", "sunwithface"),
    Concept("cloud", "cloud"),
    Concept("fire", "fire"),
    Concept("snowman", "snowman-without-snow", "snowmanwithoutsnow"),
    Concept("christmas tree", "christmas-tree", "christmastree"),
    Concept("pumpkin", "jack-o-lantern", "jackolantern"),
    Concept("ghost", "ghost"),
    Concept("alien", "alien"),
    Concept("robot", "robot"),
    Concept("rocket", "rocket"),
    Concept("balloon", "balloon"),
    Concept("crown", "crown"),
    Concept("gem", "gem-stone", "gem"),
    Concept("bell", "bell"),
    Concept("gift", "wrapped-gift", "wrappedpresent"),
    Concept("umbrella", "umbrella"),
    Concept("house", "house", "housewithgarden"),
    Concept("car", "automobile"),
    Concept("sailboat", "sailboat"),
    Concept("soccer ball", "soccer-ball", "soccerball"),
    Concept("light bulb", "light-bulb", "lightbulb"),
    Concept("cup of coffee", "hot-beverage", "hotbeverage"),
)

# Distinct at 64 px and present in four or more of the five sets; the others widen what the codec
# and the scorer see.
PAIR_CONCEPTS: tuple[str, ...] = (
    *("fox", "cat", "dog", "panda", "koala", "tiger", "rabbit", "frog", "pig", "owl", "penguin"),
    *("ladybug", "sunflower", "tulip", "cherry blossom", "cactus", "mushroom", "apple"),
    *("strawberry", "lemon", "watermelon", "doughnut", "heart", "star", "balloon", "pumpkin"),
    *("ghost", "christmas tree"),
)
