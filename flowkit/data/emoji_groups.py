"""Groups and sub-groups of emoji, by their code points, as Unicode 15.0 arranges them.

Facts of ``emoji-test.txt`` (Unicode Technical Standard 51, Unicode License V3), as ranges of the
first code point. What a sequence adds to its first code point is in `group_of`.
"""

from functools import cache

ALPHABET = range(0x1F1E6, 0x1F200)  # regional letters: two of them are the flag of a country
TONES = range(0x1F3FB, 0x1F400)
STYLE, JOINER, KEYCAP, BLACK_FLAG = 0xFE0F, 0x200D, 0x20E3, 0x1F3F4
SIGNS = (0x2640, 0x2642)  # of women and men
PEOPLE = (*range(0x1F466, 0x1F46A), 0x1F9D1, 0x1F9D2)  # who join others, or an object of a role
OTHER_ROLES = {  # of a person with an object that is not the tool of a profession
    **dict.fromkeys(range(0x1F9B0, 0x1F9B4), "person"),  # hair
    **dict.fromkeys((0x1F9AF, 0x1F9BC, 0x1F9BD), "person-activity"),
    0x1F384: "person-fantasy",
}
OTHER_PAIRS: dict[tuple[int, ...], str] = {  # not of the sub-group of their first code point
    (0x1F62E, 0x1F4A8): "face-neutral-skeptical",  # exhaling
    (0x1F441, 0x1F5E8): "emotion",  # an eye in a bubble of speech
    (0x1FAF1, 0x1FAF2): "hands",  # a handshake in two tones
}
SEQUENCES = {  # sub-groups of sequences alone
    "keycap": "Symbols",
    "country-flag": "Flags",
    "subdivision-flag": "Flags",
}

GROUPS = """
Smileys & Emotion
  face-smiling: 1f600-1f607 1f609-1f60a 1f642-1f643 1f923 1fae0
  face-affection: 263a 1f60d 1f617-1f61a 1f929 1f970 1f972
  face-tongue: 1f60b 1f61b-1f61d 1f911 1f92a
  face-hand: 1f914 1f917 1f92b 1f92d 1fae1-1fae3
  face-neutral-skeptical: 1f60f-1f612 1f62c 1f636 1f644 1f910 1f925 1f928 1fae5 1fae8
  face-sleepy: 1f60c 1f614 1f62a 1f634 1f924
  face-unwell: 1f635 1f637 1f912 1f915 1f922 1f927 1f92e-1f92f 1f974-1f976
  face-hat: 1f920 1f973 1f978
  face-glasses: 1f60e 1f913 1f9d0
  face-concerned: 2639 1f613 1f615-1f616 1f61e-1f61f 1f622-1f623 1f625-1f629 1f62b 1f62d-1f633
    1f641 1f971 1f979-1f97a 1fae4
  face-negative: 2620 1f47f-1f480 1f608 1f620-1f621 1f624 1f92c
  face-costume: 1f479-1f47b 1f47d-1f47e 1f4a9 1f916 1f921
  cat-face: 1f638-1f640
  monkey-face: 1f648-1f64a
  heart: 2763-2764 1f48c 1f493-1f49f 1f5a4 1f90d-1f90e 1f9e1 1fa75-1fa77
  emotion: 1f48b 1f4a2 1f4a4-1f4a6 1f4a8 1f4ab-1f4ad 1f4af 1f573 1f5e8 1f5ef
People & Body
  hand-fingers-open: 270b 1f44b 1f590 1f596 1f91a 1faf1-1faf4 1faf7-1faf8
  hand-fingers-partial: 270c 1f44c 1f90c 1f90f 1f918-1f919 1f91e-1f91f 1faf0
  hand-single-finger: 261d 1f446-1f449 1f595 1faf5
  hand-fingers-closed: 270a 1f44a 1f44d-1f44e 1f91b-1f91c
  hands: 1f44f-1f450 1f64c 1f64f 1f91d 1f932 1faf6
  hand-prop: 270d 1f485 1f933
  body-parts: 1f440-1f445 1f4aa 1f9b4-1f9b7 1f9bb 1f9be-1f9bf 1f9e0 1fac0-1fac1 1fae6
  person: 1f466-1f469 1f471 1f474-1f476 1f9d1-1f9d4
  person-gesture: 1f481 1f645-1f647 1f64b 1f64d-1f64e 1f926 1f937 1f9cf
  person-role: 1f46e 1f470 1f472-1f473 1f477-1f478 1f482 1f575 1f930-1f931 1f934-1f935 1f977
    1f9d5 1fac3-1fac5
  person-fantasy: 1f385 1f47c 1f936 1f9b8-1f9b9 1f9cc 1f9d9-1f9df
  person-activity: 1f3c3 1f46f 1f483 1f486-1f487 1f574 1f57a 1f6b6 1f9cd-1f9ce 1f9d6-1f9d7
  person-sport: 26f7 26f9 1f3c2 1f3c4 1f3c7 1f3ca-1f3cc 1f6a3 1f6b4-1f6b5 1f938-1f93a
    1f93c-1f93e
  person-resting: 1f6c0 1f6cc 1f9d8
  family: 1f46a-1f46d 1f48f 1f491
  person-symbol: 1f463-1f465 1f5e3 1fac2
Animals & Nature
  animal-mammal: 1f400-1f408 1f40e-1f412 1f415-1f418 1f428-1f42b 1f42d-1f431 1f434-1f437
    1f439-1f43f 1f981 1f984 1f987 1f98a 1f98c-1f98d 1f98f 1f992-1f994 1f998-1f999 1f99b 1f99d
    1f9a1 1f9a3 1f9a5-1f9a8 1f9ab-1f9ac 1f9ae 1face-1facf
  animal-bird: 1f413-1f414 1f423-1f427 1f54a 1f983 1f985-1f986 1f989 1f99a 1f99c 1f9a2 1f9a4
    1f9a9 1fab6 1fabd 1fabf
  animal-amphibian: 1f438
  animal-reptile: 1f409-1f40a 1f40d 1f422 1f432 1f98e 1f995-1f996
  animal-marine: 1f40b 1f419-1f41a 1f41f-1f421 1f42c 1f433 1f988 1f9ad 1fab8 1fabc
  animal-bug: 1f40c 1f41b-1f41e 1f577-1f578 1f982 1f98b 1f997 1f99f-1f9a0 1fab0-1fab3
  plant-flower: 1f337-1f33c 1f3f5 1f490 1f4ae 1f940 1fab7 1fabb
  plant-other: 2618 1f331-1f335 1f33e-1f344 1fab4 1fab9-1faba
Food & Drink
  food-fruit: 1f345 1f347-1f353 1f95d 1f965 1f96d 1fad0 1fad2
  food-vegetable: 1f330 1f336 1f33d 1f346 1f951-1f952 1f954-1f955 1f95c 1f966 1f96c 1f9c4-1f9c5
    1fad1 1fad8 1fada-1fadb
  food-prepared: 1f32d-1f32f 1f354-1f357 1f35e-1f35f 1f372-1f373 1f37f 1f950 1f953 1f956-1f95a
    1f95e 1f963 1f968-1f96b 1f96f 1f9c0 1f9c2 1f9c6-1f9c8 1fad3-1fad5
  food-asian: 1f358-1f35d 1f360-1f365 1f371 1f95f-1f961 1f96e
  food-marine: 1f980 1f990-1f991 1f99e 1f9aa
  food-sweet: 1f366-1f370 1f382 1f967 1f9c1
  drink: 2615 1f375-1f37c 1f37e 1f942-1f943 1f95b 1f964 1f9c3 1f9c9-1f9cb 1fad6-1fad7
  dishware: 1f374 1f37d 1f3fa 1f52a 1f944 1f962 1fad9
Travel & Places
  place-map: 1f30d-1f310 1f5fa 1f5fe 1f9ed
  place-geographic: 26f0 1f30b 1f3d4-1f3d6 1f3dc-1f3de 1f5fb
  place-building: 1f3d7-1f3d8 1f3da-1f3db 1f3df-1f3e6 1f3e8-1f3ed 1f3ef-1f3f0 1f492 1f5fc-1f5fd
    1f6d6 1f9f1 1faa8 1fab5
  place-religious: 26e9-26ea 1f54b-1f54d 1f6d5
  place-other: 2668 26f2 26fa 1f301 1f303-1f307 1f309 1f3a0-1f3a2 1f3aa 1f3d9 1f488 1f6dd
  transport-ground: 26fd 1f3cd-1f3ce 1f682-1f69e 1f6a5-1f6a8 1f6b2 1f6d1 1f6de 1f6e2-1f6e4
    1f6f4-1f6f5 1f6f9-1f6fc 1f9bc-1f9bd
  transport-water: 2693 26f4-26f5 1f6a2 1f6a4 1f6df 1f6e5 1f6f3 1f6f6
  transport-air: 2708 1f4ba 1f680-1f681 1f69f-1f6a1 1f6e9 1f6eb-1f6ec 1f6f0 1f6f8 1fa82
  hotel: 1f6ce 1f9f3
  time: 231a-231b 23f0-23f3 1f550-1f567 1f570
  sky & weather: 2600-2604 2614 26a1 26c4-26c5 26c8 26f1 2744 2b50 1f300 1f302 1f308 1f30a 1f30c
    1f311-1f321 1f324-1f32c 1f4a7 1f525 1fa90
Activities
  event: 2728 1f380-1f381 1f383-1f384 1f386-1f38b 1f38d-1f391 1f397 1f39f 1f3ab 1f9e7-1f9e8
  award-medal: 1f396 1f3c5-1f3c6 1f947-1f949
  sport: 26bd-26be 26f3 26f8 1f3a3 1f3b3 1f3bd-1f3c0 1f3c8-1f3c9 1f3cf-1f3d3 1f3f8 1f6f7 1f93f
    1f945 1f94a-1f94f
  game: 265f-2660 2663 2665-2666 1f004 1f0cf 1f3ae-1f3b2 1f3b4 1f52b 1f52e 1f579 1f9e9 1f9f8
    1fa80-1fa81 1fa84-1fa86 1faa9
  arts & crafts: 1f3a8 1f3ad 1f5bc 1f9f5-1f9f6 1faa1-1faa2
Objects
  clothing: 26d1 1f392-1f393 1f3a9 1f451-1f462 1f484 1f48d-1f48e 1f4ff 1f576 1f6cd 1f97b-1f97f
    1f9ba 1f9e2-1f9e6 1fa70-1fa74 1fa96 1faad-1faae
  sound: 1f4e2-1f4e3 1f4ef 1f507-1f50a 1f514-1f515
  music: 1f399-1f39b 1f3a4 1f3a7 1f3b5-1f3b6 1f3bc 1f4fb
  musical-instrument: 1f3b7-1f3bb 1f941 1fa87-1fa88 1fa95 1fa97-1fa98
  phone: 260e 1f4de-1f4e0 1f4f1-1f4f2
  computer: 2328 1f4bb 1f4bd-1f4c0 1f50b-1f50c 1f5a5 1f5a8 1f5b1-1f5b2 1f9ee 1faab
  light & video: 1f39e 1f3a5 1f3ac 1f3ee 1f4a1 1f4f7-1f4fa 1f4fc-1f4fd 1f50d-1f50e 1f526 1f56f
    1fa94
  book-paper: 1f3f7 1f4c3-1f4c4 1f4d1-1f4da 1f4dc 1f4f0 1f516 1f5de
  money: 1f4b0 1f4b3-1f4b9 1f9fe 1fa99
  mail: 2709 1f4e4-1f4ee 1f5f3
  writing: 270f 2712 1f4dd 1f58a-1f58d
  office: 2702 1f4bc 1f4c1-1f4c2 1f4c5-1f4d0 1f587 1f5c2-1f5c4 1f5d1-1f5d3
  lock: 1f50f-1f513 1f5dd
  tool: 2692 2694 2696 2699 26cf 26d3 1f3f9 1f4a3 1f517 1f527-1f529 1f5dc 1f5e1 1f6e0-1f6e1
    1f9af 1f9f0 1f9f2 1fa83 1fa93 1fa9a-1fa9d
  science: 2697 1f4e1 1f52c-1f52d 1f9ea-1f9ec
  medical: 1f489-1f48a 1fa78-1fa7c
  household: 1f6aa 1f6bd 1f6bf 1f6c1 1f6cb 1f6cf 1f6d2 1f6d7 1f9ef 1f9f4 1f9f7 1f9f9-1f9fd
    1fa91-1fa92 1fa9e-1faa0 1faa3-1faa5 1fae7
  other-object: 26b0-26b1 1f5ff 1f6ac 1f9ff 1faa6-1faa7 1faaa 1faac
Symbols
  transport-sign: 267f 1f3e7 1f6ae 1f6b0 1f6b9-1f6bc 1f6be 1f6c2-1f6c5
  warning: 2622-2623 26a0 26d4 1f4f5 1f51e 1f6ab 1f6ad 1f6af 1f6b1 1f6b3 1f6b7-1f6b8
  arrow: 2194-2199 21a9-21aa 27a1 2934-2935 2b05-2b07 1f503-1f504 1f519-1f51d
  religion: 2626 262a 262e-262f 2638 269b 271d 2721 1f52f 1f549 1f54e 1f6d0 1faaf
  zodiac: 2648-2653 26ce
  av-symbol: 23cf 23e9-23ef 23f8-23fa 25b6 25c0 1f3a6 1f4f3-1f4f4 1f4f6 1f500-1f502 1f505-1f506
    1f53c-1f53d 1f6dc
  gender: 2640 2642 26a7
  math: 267e 2716 2795-2797 1f7f0
  punctuation: 203c 2049 2753-2755 2757 3030
  currency: 1f4b1-1f4b2
  other-symbol: a9 ae 2122 2611 267b 2695 269c 2705 2714 2733-2734 2747 274c 274e 27b0 27bf 2b55
    303d 1f4db 1f530-1f531
  keycap: 1f51f
  alphanum: 2139 24c2 3297 3299 1f170-1f171 1f17e-1f17f 1f18e 1f191-1f19a 1f201-1f202 1f21a
    1f22f 1f232-1f23a 1f250-1f251 1f520-1f524
  geometric: 25aa-25ab 25fb-25fe 26aa-26ab 2b1b-2b1c 1f4a0 1f518 1f532-1f53b 1f7e0-1f7eb
Flags
  flag: 1f38c 1f3c1 1f3f3-1f3f4 1f6a9
"""


@cache
def by_code_point() -> dict[int, str]:
    """Return the sub-group of each first code point."""
    found: dict[int, str] = {}
    name = ""
    for line in GROUPS.strip().splitlines():
        if line.startswith("  "):
            head, _, ranges = line.rpartition(": ")  # without a name: the line before goes on
            name = head.strip() or name
            for part in ranges.split():
                first, _, last = part.partition("-")
                found.update(dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), name))
    return found


@cache
def groups() -> dict[str, str]:
    """Return the group of each sub-group, in the order of Unicode.

    >>> groups()["heart"], groups()["country-flag"]
    ('Smileys & Emotion', 'Flags')
    """
    found, group = {}, ""
    for line in GROUPS.strip().splitlines():
        if not line.startswith(" "):
            group = line
        elif ": " in line:
            found[line.partition(":")[0].strip()] = group
    return {**found, **SEQUENCES}


def plain(sequence: tuple[int, ...]) -> tuple[int, ...]:
    """Return an emoji without the tones of skin and the sign of colored style."""
    return tuple(point for point in sequence if point != STYLE and point not in TONES)


def group_of(sequence: tuple[int, ...]) -> str | None:
    """Return the sub-group of an emoji; None for what is no emoji, such as digits and tones.

    Args:
        sequence: Its code points.

    >>> group_of((0x1F469, 0x1F3FD, 0x200D, 0x1F52C)), group_of((0x1F1E8, 0x1F1F1))
    ('person-role', 'country-flag')
    """
    points = list(plain(sequence))
    if not points:
        return None
    if len(points) > 1 and points[-1] == KEYCAP:
        return "keycap"
    if len(points) == 2 and all(point in ALPHABET for point in points):
        return "country-flag"
    if points[0] == BLACK_FLAG and len(points) > 2 and JOINER not in points:
        return "subdivision-flag"
    others = [p for p in points[1:] if p != JOINER and p not in SIGNS]
    if points[0] in PEOPLE and others:
        alone = not any(point in PEOPLE for point in others)
        return OTHER_ROLES.get(others[0], "person-role") if alone else "family"
    return OTHER_PAIRS.get((points[0], *others)) or by_code_point().get(points[0])
