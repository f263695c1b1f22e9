"""Little stories and greetings in eight languages: templates and words, all written for this project."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

MOODS = ("happy", "sad", "brave")
_ENDINGS = {"happy": "🎈🎉", "sad": "🌧️💙", "brave": "🔦👨‍👩‍👧‍👦"}

_ANIMAL_EMOJI = {
    "cat": "🐱",
    "dog": "🐶",
    "bear": "🐻",
    "wolf": "🐺",
    "rabbit": "🐰",
    "horse": "🐴",
    "lion": "🦁",
    "elephant": "🐘",
    "penguin": "🐧",
    "tiger": "🐯",
}
ANIMALS = tuple(_ANIMAL_EMOJI)
PLACES = ("in the forest", "by the sea", "in the city", "in the mountains", "in the garden", "by the river")


@dataclass(frozen=True, slots=True)
class Language:
    """Words of one language, in the order of ANIMALS, PLACES and MOODS. Every animal is masculine where it matters."""

    animals: tuple[str, ...]
    places: tuple[str, ...]
    stories: tuple[str, ...]
    greeting: str


LANGUAGES: Mapping[str, Language] = {
    "English": Language(
        tuple(f"an {a}" if a == "elephant" else f"a {a}" for a in ANIMALS),
        PLACES,
        (
            "Once upon a time {a} lived {p}. One morning it found a red balloon and danced all day.",
            "There was {a} {p}. It rained, and it missed its friend. But tomorrow the sun will shine.",
            "They tell of {a} {p}. One night it heard a noise, lit a lamp and saved everyone.",
        ),
        "Hello, {n}! Welcome aboard. 🚂",
    ),
    "Spanish": Language(
        tuple(
            f"un {a}"
            for a in ("gato", "perro", "oso", "lobo", "conejo", "caballo", "león", "elefante", "pingüino", "tigre")
        ),
        ("en el bosque", "junto al mar", "en la ciudad", "en las montañas", "en el jardín", "junto al río"),
        (
            "Había una vez {a} que vivía {p}. Una mañana encontró un globo rojo y bailó todo el día.",
            "Érase {a} que vivía {p}. Llovía y echaba de menos a su amigo. Pero mañana saldrá el sol.",
            "Cuentan que {a} vivía {p}. Una noche oyó un ruido, encendió una luz y salvó a todos.",
        ),
        "¡Hola, {n}! Qué alegría verte. 💃🏽",
    ),
    "Russian": Language(
        ("кот", "пёс", "медведь", "волк", "кролик", "конь", "лев", "слон", "пингвин", "тигр"),
        ("в лесу", "у моря", "в городе", "в горах", "в саду", "у реки"),
        (
            "Жил-был {a} {p}. Однажды утром он нашёл красный шарик и танцевал весь день.",
            "Жил {a} {p}. Шёл дождь, и он скучал по другу. Но завтра будет солнце.",
            "Говорят, {a} жил {p}. Ночью он услышал шум, зажёг свет и всех спас.",
        ),
        "Привет, {n}! Добро пожаловать. ☀️",
    ),
    "Arabic": Language(
        ("قط", "كلب", "دب", "ذئب", "أرنب", "حصان", "أسد", "فيل", "بطريق", "نمر"),
        ("في الغابة", "قرب البحر", "في المدينة", "في الجبال", "في الحديقة", "قرب النهر"),
        (
            "كان يا ما كان، {a} يعيش {p}. ذات صباح وجد بالونًا أحمر ورقص طوال اليوم.",
            "كان هناك {a} يعيش {p}. نزل المطر واشتاق إلى صديقه. لكن الشمس ستشرق غدًا.",
            "يُحكى أنّ {a} عاش {p}. سمع ليلًا صوتًا، فأشعل ضوءًا وأنقذ الجميع.",
        ),
        "مرحبًا يا {n}! أهلًا وسهلًا. 🌙",
    ),
    "Hebrew": Language(
        ("חתול", "כלב", "דוב", "זאב", "ארנב", "סוס", "אריה", "פיל", "פינגווין", "טיגריס"),
        ("ביער", "ליד הים", "בעיר", "בהרים", "בגן", "ליד הנהר"),
        (
            "היה היה {a} שגר {p}. בוקר אחד הוא מצא בלון אדום ורקד כל היום.",
            "היה {a} {p}. ירד גשם והוא התגעגע לחבר שלו. אבל מחר תזרח השמש.",
            "מספרים על {a} {p}. לילה אחד הוא שמע רעש, הדליק אור והציל את כולם.",
        ),
        "שָׁלוֹם, {n}! ברוכים הבאים. 🕊️",
    ),
    "Japanese": Language(
        ("ネコ", "イヌ", "クマ", "オオカミ", "ウサギ", "ウマ", "ライオン", "ゾウ", "ペンギン", "トラ"),
        ("森", "海辺", "町", "山", "庭", "川辺"),
        (
            "むかしむかし、{p}に{a}がいました。ある朝、赤い風船を見つけて、一日中おどりました。",
            "{p}に{a}がいました。雨がふって、友だちに会いたくなりました。でも、あしたは晴れるでしょう。",
            "{p}の{a}のお話です。ある夜、物音を聞いて、明かりをつけ、みんなを助けました。",
        ),
        "{n}さん、こんにちは！ようこそ。🌸",
    ),
    "Chinese": Language(
        ("小猫", "小狗", "小熊", "小狼", "兔子", "小马", "狮子", "大象", "企鹅", "老虎"),
        ("森林里", "海边", "城市里", "山里", "花园里", "河边"),
        (
            "从前，{p}住着一只{a}。一天早上，它找到一个红气球，跳了一整天的舞。",
            "{p}有一只{a}。下雨了，它很想念朋友。不过明天太阳会出来。",
            "听说{p}有一只{a}。一天夜里，它听见响声，点亮了灯，救了大家。",
        ),
        "你好，{n}！欢迎你。🐉",
    ),
    "Hindi": Language(
        ("बिल्ला", "कुत्ता", "भालू", "भेड़िया", "खरगोश", "घोड़ा", "शेर", "हाथी", "पेंगुइन", "बाघ"),
        ("जंगल में", "समुद्र के पास", "शहर में", "पहाड़ों में", "बगीचे में", "नदी के पास"),
        (
            "एक समय की बात है, {p} एक {a} रहता था। एक सुबह उसे लाल गुब्बारा मिला और वह दिन भर नाचा।",
            "{p} एक {a} रहता था। बारिश हुई और उसे दोस्त की याद आई। पर कल धूप निकलेगी।",
            "कहते हैं, {p} एक {a} रहता था। एक रात उसने आवाज़ सुनी, दीया जलाया और सबको बचाया।",
        ),
        "नमस्ते, {n}! स्वागत है। 🙏🏽",
    ),
}

_STORY = re.compile(r"a (\w+) story in (\w+) about an? (\w+) (.+):")
_GREET = re.compile(r"greet (.+) in (\w+):")


def _article(animal: str) -> str:
    return "an" if animal == "elephant" else "a"


def draw_story(rng: random.Random) -> str:
    """`a happy story in Hindi about a cat in the forest:`."""
    animal = rng.choice(ANIMALS)
    about = f"{_article(animal)} {animal} {rng.choice(PLACES)}"
    return f"a {rng.choice(MOODS)} story in {rng.choice(tuple(LANGUAGES))} about {about}:"


def answer_story(prompt: str) -> str:
    """The one story that a prompt of `draw_story` asks for.

    Raises:
        ValueError: another prompt, or a mood, language, animal or place that the model has not learnt.
    """
    match = _STORY.fullmatch(prompt)
    if match is None:
        raise ValueError(f"not a story prompt: {prompt!r}")
    mood, language_name, animal, place = match.groups()
    language = LANGUAGES[language_name]
    story = language.stories[MOODS.index(mood)].format(
        a=language.animals[ANIMALS.index(animal)], p=language.places[PLACES.index(place)]
    )
    return f"{story} {_ANIMAL_EMOJI[animal]}{_ENDINGS[mood]}"


def greet_prompt(name: str, language: str) -> str:
    """`greet Ana in Russian:`."""
    return f"greet {name} in {language}:"


def answer_greet(prompt: str) -> str:
    """The greeting that a prompt of `greet_prompt` asks for.

    Raises:
        ValueError: another prompt.
    """
    match = _GREET.fullmatch(prompt)
    if match is None:
        raise ValueError(f"not a greeting prompt: {prompt!r}")
    return LANGUAGES[match[2]].greeting.format(n=match[1])


# The open-ended skill: one prompt, 6 * 6 * 5 * 6 * 6 right answers.
_OPENINGS = ("Once there was", "Long ago there was", "On a hill lived", "In a boat lived", "Far away lived", "I knew")
_ADJECTIVES = ("small", "clever", "sleepy", "kind", "hungry", "curious")
_HABITS = ("loved to sing", "liked long walks", "collected stones", "could not sleep", "told good jokes")
_EVENTS = (
    "One day it met a snail",
    "One night it saw a comet",
    "Then it found an old map",
    "Then the wind took its hat",
    "Suddenly it began to snow",
    "At noon a train stopped",
)
_CLOSINGS = (
    "and they became friends. 🤝",
    "and nothing was the same again. ✨",
    "so it went home and slept. 😴",
    "and it laughed for a week. 😂",
    "and it baked a cake. 🍰",
    "so it wrote a song. 🎵",
)
_PARTS = (_OPENINGS, _ADJECTIVES, _HABITS, _EVENTS, _CLOSINGS)
_OPEN = re.compile(
    "(?:{}) a (?:{}) (.+) that (?:{})\\. (?:{}), (?:{})".format(
        *("|".join(re.escape(part) for part in parts) for parts in _PARTS)
    )
)


def draw_open(rng: random.Random) -> str:
    """`tell a story about a cat:`."""
    animal = rng.choice(ANIMALS)
    return f"tell a story about {_article(animal)} {animal}:"


def answer_open(prompt: str, rng: random.Random) -> str:
    """One of the right answers, at random."""
    animal = prompt.removesuffix(":").split()[-1]
    opening, adjective, habit, event, closing = (rng.choice(parts) for parts in _PARTS)
    return f"{opening} a {adjective} {animal} that {habit}. {event}, {closing}"


def is_valid_open(prompt: str, answer: str) -> bool:
    """Whether `answer` is one of the right answers to a prompt of `draw_open`."""
    match = _OPEN.fullmatch(answer)
    return match is not None and match[1] == prompt.removesuffix(":").split()[-1]
