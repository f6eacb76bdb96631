"""Words for retrieval tasks: common English nouns, and as many more as asked for, put together from them."""

from random import Random

_NOUNS = """
anchor apple arrow badge barn basket beach bell bench berry bird blanket boat bottle branch bread brick bridge broom
bucket button cabin cable camel candle canoe carpet castle chair cherry church circle clock cloud coach coffee collar
comet copper coral corn cotton cradle crane crystal curtain daisy desert diamond donkey door dragon drum eagle engine
fabric falcon feather fence ferry fiddle field flag flute forest fountain fox garden garlic ghost glass glove goat
grape guitar hammer harbor hat hazel hill honey horse hotel island ivory jacket jewel kettle kitchen kite ladder lake
lantern leaf lemon letter library lion lizard magnet maple market meadow melon mirror monkey moon mountain needle nest
notebook oak ocean olive onion orange orchid otter oven owl paddle palace paper parrot pebble pencil pepper piano
pigeon pillow pine planet plum pocket pony potato pumpkin puzzle quilt rabbit radio raven ribbon river road robin
rocket roof rose saddle sailor salmon sandal school sheep shovel silver snow spider spoon squirrel stamp star stone
stove sugar summer sunset swan table teapot temple thunder tiger tower train tulip tunnel turtle umbrella valley
velvet violin walnut wagon water whale wheel willow window winter wolf yarn zebra
"""
NOUNS = _NOUNS.split()


def draw_words(random: Random, count: int) -> list[str]:
    """`count` different words, none of which is part of another: single ones first, then pairs such as `stone-river`."""
    words = random.sample(NOUNS, min(count, len(NOUNS)))
    taken = set(words)
    while len(words) < count:
        pair = "-".join(random.sample(NOUNS, 2))
        if pair not in taken:
            taken.add(pair)
            words.append(pair)
    return words


def number(random: Random) -> str:
    """A number of seven digits."""
    return str(random.randrange(10**6, 10**7))
