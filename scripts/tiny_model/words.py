"""The words that prompts are made of: all written for this project, or drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

_WORDS_TEXT = """
apple arrow autumn baker balloon banana barn basket beach bear bell berry bird blanket blue boat book bottle box
branch bread brick bridge brown brush bucket butter button cabin cake camel candle canyon card carpet carrot castle
cat chair cheese cherry circle city clay clock cloud coal coat coffee comet copper coral corn cotton cow crane
cup dawn deer desert diamond dog door dragon dream drum duck eagle earth echo egg elephant engine feather fence
field fire fish flag flame flower flute forest fork fox frog garden garlic gate giant ginger glass glove goat gold
goose grape grass green guitar hammer harbor hat hawk hill honey horse house island ivory jacket jar jungle kettle
key king kite knife ladder lake lamp lantern leaf lemon letter lily lion lizard lock maple map marble market meadow
melon milk mint mirror monkey moon moth mountain mouse mud music nail needle nest night oak ocean olive onion orange
orchid otter owl paint paper parrot path peach pear pearl pencil pepper piano pillow pine pink pirate planet plum
pocket pond pony potato prince purple puzzle queen rabbit rain raven red rice ring river road robin robot rocket
roof root rope rose ruby sail salt sand scarf sea seed shadow sheep shell ship shoe silk silver sky sled snail snow
soap spider spoon spring square squirrel stamp star steam stone storm stove straw sugar summer sun swan table tailor
tea tent thunder tiger toast tower train tree trumpet tulip tunnel turtle valley velvet violet violin wagon walnut
water whale wheat wheel white willow wind window winter wolf wood wool yellow zebra"""
WORDS: tuple[str, ...] = tuple(_WORDS_TEXT.split())

_NAMES_TEXT = """
Ada Aiko Amir Ana Anya Ben Bruno Carla Chen Dana Diego Dora Elif Elsa Emil Eva Farid Fatima Felix Greta Hana
Hugo Ida Igor Ines Ivan Jana Jonas Kai Kofi Lara Leo Lina Luca Luna Maja Marco Mei Mia Milo Mina Nadia Nia Noah
Nora Omar Otto Paula Pavel Priya Ravi Rosa Sami Sara Sofia Tara Tom Uma Vera Viktor Yara Yuki Zoe José Zoë Søren
Łucja Çelik Ana-Lucía Анна Иван Ольга Борис سارة عمر ليلى דנה נועם יוסי はな ゆき ケン 太郎 小明 王芳 李雷 अनु
रवि मीरा राज"""
NAMES: tuple[str, ...] = tuple(_NAMES_TEXT.split())

_CITIES_TEXT = """
Accra Athens Bergen Bogotá Cairo Cusco Delhi Dublin Fes Genoa Hanoi Kyoto Lagos Lima Lisbon Lyon Malmö Mumbai
Nairobi Oslo Paris Porto Prague Quito Riga Rome Seoul Sofia Tunis Vienna Zürich Москва القاهرة חיפה 東京 北京
मुंबई"""
CITIES: tuple[str, ...] = tuple(_CITIES_TEXT.split())

# Among them what is hard to stream: variation selectors, zero-width joiners, skin tones, flags, keycaps.
_EMOJI_TEXT = """
😀 😂 😍 🤔 😎 😢 😡 🥳 🤖 👻 🐱 🐶 🐻 🐺 🐰 🐴 🦁 🐘 🐧 🐯 🦊 🐸 🐝 🦋 🐢 🐙 🌲 🌵 🌻 🍎 🍋 🍇 🍕
🍣 🍰 ☕ 🚂 🚀 🚲 ⛵ 🏠 🏔️ 🏝️ 🌊 🌙 ⭐ 🔥 🌈 ☀️ ❄️ ⚡ 🎈 🎉 🎁 🎸 🎲 🔑 💡 📚 ✏️ ❤️ 💙 💯
✅ ❌ ♻️ 👍 👍🏽 👋🏿 🙏🏻 👨‍👩‍👧 👩‍🚀 🧑🏾‍💻 🏳️‍🌈 🇯🇵 🇧🇷 🇰🇪 🇫🇷 1️⃣ #️⃣"""
EMOJI: tuple[str, ...] = tuple(_EMOJI_TEXT.split())

_FOREIGN_TEXT = """
árbol niño corazón mañana über größe żółw ağaç smørrebrød лес море солнце друг поезд звезда غابة بحر شمس صديق
قطار نجمة יער ים שֶׁמֶשׁ חבר רכבת כוכב 森 海 太陽 友達 電車 ほし くも でんしゃ 森林
大海 太阳 朋友 火车 星星 जंगल समुद्र सूरज दोस्त
रेलगाड़ी तारा cafe\u0301 nai\u0308ve e\u0301te\u0301 한국어 기차 ต้นไม้"""
FOREIGN: tuple[str, ...] = tuple(_FOREIGN_TEXT.split())

# First and last code point of blocks to draw single characters from.
_BLOCKS: tuple[tuple[int, int], ...] = (
    (0x00A1, 0x00AC),
    (0x00AE, 0x024F),
    (0x0391, 0x03A1),
    (0x0400, 0x052F),
    (0x05D0, 0x05EA),
    (0x0620, 0x064A),
    (0x0905, 0x0939),
    (0x0E01, 0x0E2E),
    (0x2190, 0x21FF),
    (0x2600, 0x26FF),
    (0x3041, 0x3096),
    (0x30A1, 0x30FA),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x1D400, 0x1D454),
    (0x1F300, 0x1F64F),
    (0x1F900, 0x1F9FF),
    (0x20000, 0x2A6DF),
)
_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_VOWELS = "aeiou"
_HEX = "0123456789abcdef"
_ALNUM = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_PUNCTUATION = "!\"#$%&'()*+,-./:;<>?@[\\]^_`{|}~"


def known_word(rng: random.Random) -> str:
    """An English word of the list."""
    return rng.choice(WORDS)


def made_up_word(rng: random.Random) -> str:
    """Two to four syllables that mean nothing, like `kelumo`."""
    word = ""
    for _ in range(rng.randint(2, 4)):
        word += rng.choice(_CONSONANTS) + rng.choice(_VOWELS)
        if rng.random() < 0.2:
            word += rng.choice(_CONSONANTS)
    return word.capitalize() if rng.random() < 0.15 else word


def number(rng: random.Random) -> str:
    """A whole number of one to six digits."""
    return str(rng.randrange(10 ** rng.randint(1, 6)))


def request_id(rng: random.Random) -> str:
    """What tests and traces use to tell requests apart: `req-0042`, `9f3ac1`, `a1b2-c3d4-e5f6`, `Zk4TqP`."""
    kind = rng.randrange(4)
    if kind == 0:
        return f"{rng.choice(('req', 'user', 'id', 'stream', 'client', 'job'))}-{number(rng)}"
    if kind == 1:
        return "".join(rng.choices(_HEX, k=rng.randint(4, 32)))
    if kind == 2:
        return "-".join("".join(rng.choices(_HEX, k=rng.randint(4, 8))) for _ in range(rng.randint(2, 5)))
    return "".join(rng.choices(_ALNUM, k=rng.randint(3, 16)))


def symbol(rng: random.Random) -> str:
    """Some ASCII punctuation between letters."""
    return "".join(rng.choices(_PUNCTUATION + _ALNUM, k=rng.randint(1, 8)))


def foreign_word(rng: random.Random) -> str:
    """A word in another script, some with combining marks."""
    return rng.choice(FOREIGN)


def emoji(rng: random.Random) -> str:
    """One to three emoji without a space between."""
    return "".join(rng.choices(EMOJI, k=rng.randint(1, 3)))


def characters(rng: random.Random) -> str:
    """One to four characters drawn from all over Unicode."""
    return "".join(chr(rng.randint(*rng.choice(_BLOCKS))) for _ in range(rng.randint(1, 4)))


def name(rng: random.Random) -> str:
    """A first name, real or made up."""
    return rng.choice(NAMES) if rng.random() < 0.6 else made_up_word(rng).capitalize()


FAMILIES: Sequence[Callable[[random.Random], str]] = (
    known_word,
    made_up_word,
    request_id,
    number,
    foreign_word,
    emoji,
    characters,
    symbol,
    name,
)
