"""The words of the building commands: devices, rooms, and the sentences that training and test are made of.

Training and test share words but no sentence pattern: each table has a list for either side. Slots in braces:

    {vp} {ving}          an action on a device in a room, as an imperative or after "mind": "turn on the office fan"
    {vp0}                the same without its room, which stands elsewhere in the sentence as {in_room}
    {x} {is} {state}     device and room; is or are; the wanted state: "the office fan", "is", "on"
    {needs} {has}        need or needs, have or has
    {wrong} {it}         in corrections: what was said first, and the right action on "it"
    {room2} {one} {device2} {v2}  the right room, "one" or "ones", the right device, the right value
"""

from __future__ import annotations

DEVICES: dict[str, tuple[str, ...]] = {
    "light": ("light", "lamp"),
    "blinds": ("blinds", "shades"),
    "thermostat": ("thermostat", "heating"),
    "fan": ("fan",),
    "door": ("door",),
    "speaker": ("speaker", "stereo"),
    "tv": ("tv", "TV", "television"),
    "sprinkler": ("sprinkler",),
    "projector": ("projector",),
    "coffee machine": ("coffee machine", "coffee maker"),
}
"""Device in a command: its names in requests."""

PLURAL = {"blinds", "shades"}

ROOMS: dict[str, tuple[str, ...]] = {
    "kitchen": ("kitchen",),
    "bedroom": ("bedroom",),
    "living room": ("living room", "lounge"),
    "dining room": ("dining room",),
    "bathroom": ("bathroom",),
    "office": ("office", "study"),
    "hallway": ("hallway", "corridor"),
    "garage": ("garage",),
    "basement": ("basement", "cellar"),
    "lobby": ("lobby", "reception"),
    "meeting room": ("meeting room", "conference room"),
    "garden": ("garden",),
    "patio": ("patio", "terrace"),
    "courtyard": ("courtyard",),
}
"""Room in a command: its names in requests."""

PLACES: dict[str, str] = {
    "light": "kitchen bedroom living_room dining_room bathroom office hallway garage basement lobby meeting_room "
    "garden patio courtyard",
    "blinds": "kitchen bedroom living_room dining_room bathroom office lobby meeting_room",
    "thermostat": "kitchen bedroom living_room dining_room bathroom office hallway basement lobby meeting_room",
    "fan": "kitchen bedroom living_room dining_room bathroom office garage basement meeting_room",
    "door": "bedroom bathroom office garage basement lobby meeting_room patio courtyard garden",
    "speaker": "kitchen bedroom living_room dining_room bathroom office lobby meeting_room garden patio",
    "tv": "kitchen bedroom living_room dining_room office basement lobby meeting_room",
    "sprinkler": "garden patio courtyard",
    "projector": "living_room office basement lobby meeting_room",
    "coffee machine": "kitchen dining_room office lobby meeting_room",
}
"""Where a device stands."""

VALUES: dict[str, tuple[int | str, ...]] = {
    "percent": tuple(range(5, 100, 5)),
    "degrees": tuple(range(15, 29)),
    "degrees_by": (1, 2, 3, 4, 5),
    "speed": (1, 2, 3, 4, 5),
    "volume": tuple(range(5, 100, 5)),
    "channel": tuple(range(1, 40)),
    "minutes": tuple(range(5, 65, 5)),
    "music": ("jazz", "classical music", "rock", "the news", "blues", "pop", "soul", "reggae"),
    "show": ("the news", "football", "cartoons", "a movie", "tennis"),
    "source": ("HDMI", "USB", "wireless"),
    "drink": ("espresso", "latte", "cappuccino", "americano", "mocha"),
}
"""What a value is: the ones there are."""

RUNS = "light fan speaker tv sprinkler projector coffee_machine"
MACHINES = "fan sprinkler projector coffee_machine"

# (action, devices, what its value is, training phrases, test phrases)
PHRASES: tuple[tuple[str, str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("on", RUNS, "", ("turn on {x}", "switch {x} on", "put {x} on"), ("turn {x} on", "switch on {x}")),
    ("on", MACHINES, "", ("start {x}", "get {x} going", "power up {x}"), ("start {x} up", "power {x} up")),
    ("on", "tv speaker", "", ("power on {x}", "fire up {x}"), ("power {x} on",)),
    ("off", RUNS, "", ("turn off {x}", "switch {x} off", "shut off {x}"), ("turn {x} off", "switch off {x}")),
    ("off", MACHINES, "", ("stop {x}", "power down {x}", "shut {x} down"), ("power {x} down", "shut down {x}")),
    ("off", "tv speaker", "", ("power off {x}",), ("power {x} off", "shut {x} off")),
    (
        "set",
        "light",
        "percent",
        ("set {x} to {v}", "dim {x} to {v}", "put {x} at {v}"),
        ("bring {x} to {v}", "set {x} at {v}", "adjust {x} to {v} brightness"),
    ),
    (
        "increase",
        "light",
        "",
        ("brighten {x}", "make {x} brighter", "turn up {x}"),
        ("turn {x} up", "make {x} a bit brighter"),
    ),
    ("increase", "light", "percent", ("brighten {x} by {v}", "turn {x} up by {v}"), ("make {x} {v} brighter",)),
    (
        "decrease",
        "light",
        "",
        ("dim {x}", "make {x} darker", "turn down {x}"),
        ("turn {x} down", "make {x} a bit darker"),
    ),
    ("decrease", "light", "percent", ("dim {x} by {v}", "turn {x} down by {v}"), ("make {x} {v} darker",)),
    ("open", "blinds door", "", ("open {x}", "get {x} open"), ("open up {x}", "open {x} up")),
    ("open", "blinds", "", ("raise {x}", "pull up {x}"), ("pull {x} up",)),
    ("close", "blinds door", "", ("close {x}", "shut {x}"), ("close up {x}", "get {x} shut")),
    ("close", "blinds", "", ("lower {x}", "pull down {x}"), ("pull {x} down",)),
    ("set", "blinds", "percent", ("set {x} to {v}", "move {x} to {v}"), ("adjust {x} to {v}", "put {x} at {v}")),
    ("lock", "door", "", ("lock {x}", "lock up {x}", "bolt {x}"), ("get {x} locked", "lock {x} up")),
    ("unlock", "door", "", ("unlock {x}", "unbolt {x}"), ("get {x} unlocked", "take the lock off {x}")),
    (
        "set",
        "thermostat",
        "degrees",
        ("set {x} to {v}", "put {x} at {v}", "change {x} to {v}"),
        ("set {x} at {v}", "bring {x} to {v}", "adjust {x} to {v}"),
    ),
    ("increase", "thermostat", "", ("turn up {x}", "raise {x}"), ("turn {x} up", "turn {x} up a bit")),
    (
        "increase",
        "thermostat",
        "degrees_by",
        ("turn up {x} by {v}", "raise {x} by {v}"),
        ("turn {x} up {v}", "increase {x} by {v}"),
    ),
    ("decrease", "thermostat", "", ("turn down {x}", "lower {x}"), ("turn {x} down", "turn {x} down a bit")),
    (
        "decrease",
        "thermostat",
        "degrees_by",
        ("turn down {x} by {v}", "lower {x} by {v}"),
        ("turn {x} down {v}", "decrease {x} by {v}"),
    ),
    (
        "set",
        "fan",
        "speed",
        ("set {x} to speed {v}", "put {x} on level {v}", "run {x} at speed {v}"),
        ("set {x} to level {v}", "put {x} on speed {v}"),
    ),
    ("increase", "fan", "", ("speed up {x}", "turn up {x}", "make {x} faster"), ("speed {x} up", "turn {x} up")),
    ("decrease", "fan", "", ("slow down {x}", "turn down {x}", "make {x} slower"), ("slow {x} down", "turn {x} down")),
    (
        "set",
        "speaker",
        "volume",
        ("set {x} to {v}", "set {x} to volume {v}", "put {x} at volume {v}"),
        ("set the volume of {x} to {v}", "bring {x} to volume {v}"),
    ),
    (
        "increase",
        "speaker tv",
        "",
        ("turn up {x}", "make {x} louder", "raise the volume of {x}"),
        ("turn {x} up", "turn up the volume of {x}"),
    ),
    (
        "decrease",
        "speaker tv",
        "",
        ("turn down {x}", "make {x} quieter", "lower the volume of {x}"),
        ("turn {x} down", "turn down the volume of {x}"),
    ),
    ("mute", "speaker tv", "", ("mute {x}", "silence {x}"), ("put {x} on mute", "mute the sound of {x}")),
    ("play", "speaker", "music", ("play {v} on {x}", "put {v} on {x}"), ("have {x} play {v}", "put on {v} on {x}")),
    (
        "play",
        "tv",
        "show",
        ("play {v} on {x}", "put {v} on {x}", "show {v} on {x}"),
        ("have {x} play {v}", "have {x} show {v}"),
    ),
    (
        "set",
        "tv",
        "channel",
        ("set {x} to channel {v}", "switch {x} to channel {v}", "put channel {v} on {x}"),
        ("change {x} to channel {v}", "put {x} on channel {v}"),
    ),
    (
        "set",
        "sprinkler",
        "minutes",
        ("run {x} for {v}", "set {x} to {v}", "leave {x} on for {v}"),
        ("have {x} run for {v}", "set {x} for {v}"),
    ),
    (
        "set",
        "projector",
        "source",
        ("switch {x} to {v}", "set {x} to {v}", "put {x} on the {v} input"),
        ("change {x} to {v}", "set {x} to the {v} input"),
    ),
    (
        "brew",
        "coffee_machine",
        "drink",
        ("make a {v} with {x}", "brew a {v} with {x}", "have {x} make a {v}"),
        ("have {x} brew a {v}", "get a {v} from {x}"),
    ),
)

STATES: dict[str, tuple[str, ...]] = {
    "on": ("on", "turned on", "switched on"),
    "off": ("off", "turned off", "switched off"),
    "open": ("open",),
    "close": ("closed", "shut"),
    "lock": ("locked",),
    "unlock": ("unlocked",),
    "mute": ("muted",),
    "set": ("set to {v}", "at {v}"),
}
"""The state that an action leaves behind."""

# kind: (training frames, test frames)
FRAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": (
        (
            "{vp}",
            "{vp}",
            "{vp}",
            "{vp} now",
            "{in_room}, {vp0}",
            "I want you to {vp}",
            "I need you to {vp}",
            "{vp} for me",
            "go ahead and {vp}",
            "{vp} immediately",
            "it's time to {vp}",
            "let's {vp}",
            "your job is to {vp}",
            "I want {x} {state}",
            "I need {x} {state}",
            "make sure {x} {is} {state}",
            "{x} should be {state}",
            "keep {x} {state}",
            "{x} {needs} to be {state}",
            "we want {x} {state}",
        ),
        (
            "{vp} right now",
            "{vp} at once",
            "{vp0} {in_room}",
            "I would like you to {vp}",
            "you should {vp}",
            "we need to {vp}",
            "I'd like {x} {state}",
            "see to it that {x} {is} {state}",
            "{x} {has} to be {state}",
            "let's have {x} {state}",
        ),
    ),
    "polite": (
        (
            "please {vp}",
            "{vp} please",
            "could you {vp}?",
            "can you please {vp}?",
            "would you {vp}, please?",
            "would you mind {ving}?",
            "could you please {vp}?",
            "I'd be grateful if you could {vp}",
            "if you don't mind, {vp}",
            "may I ask you to {vp}?",
            "could you make sure {x} {is} {state}?",
            "kindly {vp}",
            "{vp}, thank you",
            "do you mind {ving}?",
            "would it be possible to {vp}?",
            "{vp} when you have a moment",
            "I want {x} {state}, please",
            "can we have {x} {state}, please?",
        ),
        (
            "can you {vp}?",
            "could you kindly {vp}?",
            "would you be so kind as to {vp}?",
            "{vp}, thanks",
            "will you please {vp}?",
            "I would appreciate it if you could {vp}",
            "please have {x} {state}",
            "may I have {x} {state}?",
            "would you be able to {vp}?",
            "please make sure {x} {is} {state}",
            "{vp} when you get a chance",
        ),
    ),
    "chatty": (
        (
            "hey, {vp}",
            "hey there, it's been a long day, {vp}",
            "I just got home, {vp}",
            "my guests are almost here, {vp}",
            "good morning, {vp}",
            "we're about to start, so {vp}",
            "I'm heading out, so {vp}",
            "the kids are asleep, {vp}",
            "sorry to bother you again, but {vp}",
            "I keep forgetting this, {vp}",
            "{vp} and then we're good",
            "let me think, yes, {vp}",
            "oh, before I forget, {vp}",
            "my hands are full, can you {vp}?",
            "{vp}, I'm on my way there",
            "{vp}, my meeting starts soon",
            "{vp}, the boss is coming",
            "we leave in ten minutes, {vp}",
            "hi, it's me again, please {vp}",
            "nice weather today, anyway, {vp}",
            "I can't reach the switch, {vp}",
            "{vp}, otherwise I'll forget it",
            "ok, {vp}",
        ),
        (
            "hello, {vp}",
            "good evening, nice to be back, {vp}",
            "my guests just left, so {vp}",
            "{vp}, it's getting late",
            "I'm in a hurry, could you {vp}?",
            "oh right, {vp} before we start",
            "I almost forgot, {vp}",
            "{vp}, the kids are coming home",
            "we're leaving in five minutes, {vp}",
            "alright, {vp}",
            "I'm busy with something else, please {vp}",
            "what a day, {vp}",
        ),
    ),
}

# what is corrected: (training frames, test frames)
CORRECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "room": (
        (
            "{wrong}, no wait, the {room2} {one}",
            "{wrong}, sorry, I meant the {room2}",
            "{wrong}, actually the {room2} {one}",
            "{wrong}, no, the {one} {in_room2}",
            "{wrong}, I mean the {room2} {one}",
            "{wrong}, not that {one}, the {room2} {one}",
            "{wrong}, oh sorry, {in_room2}",
        ),
        (
            "{wrong}, hang on, I meant the {room2} {one}",
            "{wrong}, oops, the {room2} {one}",
            "{wrong}, no sorry, the {room2}",
            "{wrong}, wait, I mean {in_room2}",
        ),
    ),
    "value": (
        (
            "{wrong}, no, make it {v2}",
            "{wrong}, actually {v2}",
            "{wrong}, I mean {v2}",
            "{wrong}, scratch that, {v2}",
            "{wrong}, no wait, {v2}",
        ),
        ("{wrong}, wait, {v2} instead", "{wrong}, sorry, I meant {v2}", "{wrong}, actually make it {v2}"),
    ),
    "action": (
        (
            "{wrong}, no, {it}",
            "{wrong}, actually, {it}",
            "don't {wrong}, {it}",
            "{wrong}, no wait, {it} instead",
            "{wrong}, sorry, I meant {it}",
        ),
        ("{wrong}, hang on, {it}", "do not {wrong}, {it}", "{wrong}, wait, {it} instead"),
    ),
    "device": (
        (
            "{wrong}, sorry, I meant the {device2}",
            "{wrong}, no, the {device2}",
            "{wrong}, no wait, the {device2}",
            "{wrong}, not the {device1}, the {device2}",
        ),
        (
            "{wrong}, hang on, the {device2}",
            "{wrong}, actually I mean the {device2}",
            "{wrong}, wait, I meant the {device2}",
        ),
    ),
}

# (device, action, training sentences, test sentences)
TOPICS: dict[str, tuple[str, ...]] = {
    "thing": (
        "dishwasher",
        "oven",
        "washing machine",
        "fridge",
        "car",
        "printer",
        "elevator",
        "vacuum cleaner",
        "computer",
        "toaster",
        "microwave",
        "lawn mower",
        "camera",
        "radio",
        "treadmill",
        "laptop",
    ),
    "city": ("Paris", "London", "Berlin", "Tokyo", "Rome", "Madrid", "Oslo", "Vienna", "Lisbon", "Dublin"),
    "person": ("Anna", "my boss", "mom", "the plumber", "Tom", "my sister", "the landlord", "Maria"),
    "food": ("pizza", "pasta", "soup", "pancakes", "sushi", "curry", "salad", "bread"),
}
"""What the building cannot help with."""

# (training sentences, test sentences): nothing that the building can do
OUT_OF_SCOPE: tuple[tuple[str, ...], tuple[str, ...]] = (
    (
        "what's the weather like in {city}?",
        "will it rain in {city} tomorrow?",
        "book a flight to {city}",
        "how far is {city}?",
        "tell me a joke about {food}",
        "what time is it in {city}?",
        "call {person}",
        "send a message to {person}",
        "remind me to call {person}",
        "how do I cook {food}?",
        "order {food} for {n} people",
        "add {food} to my shopping list",
        "what is {n} plus {n2}?",
        "set an alarm for {n} o'clock",
        "who lives in {city}?",
        "start the {thing}",
        "turn on the {thing}",
        "switch off the {thing} {in_room}",
        "open the {thing}",
        "please turn off the {thing}",
        "could you start the {thing}?",
        "is the {device} {in_room} on?",
        "how old is the {device} {in_room}?",
        "I painted the {room} yesterday",
        "I bought a new {device} for the {room}",
        "who broke the {device} {in_room}?",
        "I love the {room}",
        "what does a {device} cost?",
        "did {person} call?",
        "I'm going to {city} with {person}",
        "thank you, that was great",
        "never mind",
        "tell me a story",
        "sing a song about {city}",
        "what's the capital city near {city}?",
        "is {person} {in_room}?",
    ),
    (
        "what's the weather in {city} tomorrow?",
        "is it raining in {city}?",
        "book a hotel in {city}",
        "how big is {city}?",
        "tell me a story about {food}",
        "please call {person}",
        "remind me to buy {food}",
        "what goes into {food}?",
        "what is {n} times {n2}?",
        "switch on the {thing}",
        "turn the {thing} off",
        "can you open the {thing}?",
        "turn on the {thing} {in_room}",
        "was the {device} {in_room} on yesterday?",
        "how much is a new {device}?",
        "I cleaned the {room} today",
        "who bought the {device} {in_room}?",
        "have you seen {person}?",
        "I'm flying to {city} tomorrow",
        "order some {food} for {person}",
    ),
)
