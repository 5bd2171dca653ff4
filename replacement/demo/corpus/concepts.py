"""Pairs of opposite concepts, each with one English, one French and one Spanish word.

No spelling occurs twice, neither across languages nor for two concepts, so that a word names
one concept in one language.
"""

LANGUAGES: tuple[str, ...] = ("English", "French", "Spanish")

_TABLE = """
hot cold | chaud froid | caliente frío
big small | grand petit | grande pequeño
fast slow | rapide lent | rápido lento
rich poor | riche pauvre | rico pobre
young old | jeune vieux | joven viejo
happy sad | heureux malheureux | feliz triste
strong weak | fort faible | fuerte débil
open closed | ouvert fermé | abierto cerrado
full empty | plein vide | lleno vacío
clean dirty | propre sale | limpio sucio
heavy light | lourd léger | pesado ligero
high low | haut bas | alto bajo
wide narrow | large étroit | ancho estrecho
hard soft | dur mou | duro blando
wet dry | mouillé sec | mojado seco
thick thin | épais mince | grueso delgado
true false | vrai faux | verdadero falso
early late | tôt tard | temprano tarde
day night | jour nuit | día noche
love hate | amour haine | amor odio
life death | vie mort | vida muerte
beginning end | début fin | principio final
victory defeat | victoire défaite | victoria derrota
truth lie | vérité mensonge | verdad mentira
friend enemy | ami ennemi | amigo enemigo
north south | nord sud | norte sur
left right | gauche droite | izquierda derecha
buy sell | acheter vendre | comprar vender
laugh cry | rire pleurer | reír llorar
win lose | gagner perdre | ganar perder
sweet bitter | doux amer | dulce amargo
easy difficult | facile difficile | fácil difícil
beautiful ugly | beau laid | hermoso feo
healthy sick | sain malade | sano enfermo
black white | noir blanc | negro blanco
quiet noisy | silencieux bruyant | silencioso ruidoso
modern ancient | moderne ancien | moderno antiguo
useful useless | utile inutile | útil inútil
build destroy | construire détruire | construir destruir
winter summer | hiver été | invierno verano
"""

PAIRS: tuple[tuple[tuple[str, str], ...], ...] = tuple(
    tuple((words.split()[0], words.split()[1]) for words in line.split("|")) for line in _TABLE.strip().splitlines()
)
"""`PAIRS[pair][language]` is (word, its opposite), languages ordered as in `LANGUAGES`."""

CONCEPTS: tuple[tuple[str, ...], ...] = tuple(
    tuple(languages[i][side] for i in range(len(LANGUAGES))) for languages in PAIRS for side in (0, 1)
)
"""`CONCEPTS[concept][language]` is a word. Concepts 2 k and 2 k + 1 are opposites."""


def opposite(concept: int) -> int:
    """The index of the opposite concept."""
    return concept ^ 1
