"""What the language model is told to do: our own words, put together from the language, the pictures and the task."""

from wan21.prompt.settings import Language

_TASK: dict[Language, str] = {
    "en": (
        "You write prompts for a model that makes {what} from text. The user gives an idea, often a short one. "
        "Write it out as one English paragraph of 80 to 100 words."
    ),
    "zh": (
        "你为一个根据文字生成{what}的模型撰写提示词。用户会给出一个想法，往往很短。"
        "请把它写成一段 80 到 100 字的中文描述。"
    ),
}
_RULES: dict[Language, tuple[str, ...]] = {
    "en": (
        "Keep the meaning, and every name, number and quoted text that the user gives; quoted text stays as it is.",
        "Say who or what is seen: looks, clothing, posture, expression, and where things stand to each other.",
        "Say where and when it is: place, light, weather, mood.",
        "Name the visual style first if the user names one; otherwise choose the one that fits best.",
    ),
    "zh": (
        "保持原意，保留用户给出的名称、数字和引号内的文字，引号内的文字不要翻译或改动。",
        "写清画面主体：外貌、衣着、姿态、表情，以及事物之间的位置关系。",
        "写清时间与环境：地点、光线、天气、氛围。",
        "用户指定了画面风格时先写风格，否则选用最合适的一种。",
    ),
}
_MOVES: dict[Language, str] = {
    "en": "Say what moves and how, in simple verbs, and what the camera does: shot size, angle, movement.",
    "zh": "用简单直接的动词写清什么在动、怎样动，以及镜头的景别、角度和运动。",
}
_STANDS: dict[Language, str] = {
    "en": "It is a still: say how it is framed, from which angle and distance, and tell of no movement.",
    "zh": "这是一张静态图片：写清构图、视角和远近，不要写运动过程。",
}
_PICTURES: dict[Language, dict[int, str]] = {
    "en": {
        1: "The picture is the first frame: describe what is really in it, and let the user's idea set what happens.",
        2: (
            "The two pictures are the first and the last frame: describe what is really in them, and tell in one "
            "continuous movement how the first becomes the last, as the user's idea has it."
        ),
    },
    "zh": {
        1: "所附图片是视频的第一帧：如实描述图中内容，再按用户的想法写接下来发生的变化。",
        2: (
            "所附两张图片依次是视频的第一帧和最后一帧：如实描述图中内容，"
            "并按用户的想法写出从第一帧连续变化到最后一帧的过程。"
        ),
    },
}
_ANSWER: dict[Language, str] = {
    "en": "Answer in English whatever language the user writes, with the paragraph alone: no title, no remarks.",
    "zh": "无论用户使用哪种语言，都用中文回答，只输出这段描述本身，不要标题，不要说明。",
}
_WHAT: dict[Language, tuple[str, str]] = {"en": ("videos", "images"), "zh": ("视频", "图片")}


def instruction(language: Language, *, num_pictures: int, is_image: bool) -> str:
    """The system message.

    Args:
        language: of the instruction and of the answer.
        num_pictures: how many go with the prompt: 0, 1 (first frame) or 2 (first and last).
        is_image: whether an image is made, which knows no movement.
    """
    lines = [
        _TASK[language].format(what=_WHAT[language][is_image]),
        *_RULES[language],
        _STANDS[language] if is_image else _MOVES[language],
    ]
    if num_pictures:
        lines.append(_PICTURES[language][num_pictures])
    return "\n".join([*lines, _ANSWER[language]])
