"""What can be measured of a page's looks: contrast, width, the names that a screen reader says.

WCAG 2.2, level AA: the numbers in brackets are its success criteria.
"""

# Contrast (1.4.3): the colour of each text that can be seen, against what is painted behind it.
# Large text (24 px, or 18.66 px and bold) needs 3, other text 4.5. A control that is disabled needs
# none.
_CONTRAST = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const known = new Map();
const colour = (css) => {
  if (!known.has(css)) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = css;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    known.set(css, [r, g, b, a / 255]);
  }
  return known.get(css);
};
const over = ([r, g, b, a], [R, G, B]) =>
  [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
// What is behind everything is dark only in a page that says that it can be dark.
const able = getComputedStyle(document.documentElement).colorScheme
  + (document.querySelector("meta[name=color-scheme]")?.content ?? "");
const dark = matchMedia("(prefers-color-scheme: dark)").matches && able.includes("dark");
const behind = (element) => {
  const layers = [];
  for (let each = element; each; each = each.parentElement) {
    const layer = colour(getComputedStyle(each).backgroundColor);
    layers.push(layer);
    if (layer[3] === 1) break;
  }
  const paper = dark ? [18, 18, 18] : [255, 255, 255];
  return layers.reduceRight((under, layer) => over(layer, under), paper);
};
const light = (rgb) => {
  const [r, g, b] = rgb.slice(0, 3).map((value) => {
    value /= 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const UNREAD = ":disabled, [aria-disabled=true], script, style, noscript";
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, element = node.parentElement;
  if (!node.data.trim() || element.closest(UNREAD)) continue;
  if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
  const box = element.getBoundingClientRect();
  if (box.width <= 1 || box.height <= 1) continue;
  const style = getComputedStyle(element), ground = behind(element);
  const [a, b] = [light(over(colour(style.color), ground)), light(ground)];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
  const least = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
  const text = node.data.trim().slice(0, 40);
  if (ratio < least) found.push(`contrast ${ratio.toFixed(2)} of "${text}"`);
}
return [...new Set(found)];
"""

# Reflow (1.4.10): nobody scrolls sideways to read. What a box of its own scrolls or cuts off does
# not count.
_WIDTH = """
const width = document.documentElement.clientWidth;
const found = [];
if (document.documentElement.scrollWidth > width)
  found.push(`the page is ${document.documentElement.scrollWidth} wide, the window ${width}`);
const isKept = (element) => {
  for (let each = element.parentElement; each && each !== document.body; each = each.parentElement)
    if (getComputedStyle(each).overflowX !== "visible") return true;
  return false;
};
for (const element of document.body.querySelectorAll("*")) {
  const box = element.getBoundingClientRect();
  if (box.width > 1 && box.right > width + 1 && element.checkVisibility({ opacityProperty: true })
      && !isKept(element)) {
    const name = element.tagName.toLowerCase() + (element.id && `#${element.id}`);
    found.push(`${name} ends at ${Math.round(box.right)} of ${width}`);
  }
}
return found.slice(0, 10);
"""

# Parts that do something must say what (4.1.2).
_NAMED_ROLES = {
    "button", "checkbox", "combobox", "dialog", "link", "listbox", "menuitem", "radio", "searchbox",
    "spinbutton", "switch", "tab", "textbox", "image", "img",
}  # fmt: skip


def faults(page) -> list:
    """What is wrong with a page as it is now, in words; no fault is an empty list."""
    return [*page.script(_CONTRAST), *page.script(_WIDTH), *_nameless(page)]


def _nameless(page):
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})
    for node in tree["nodes"]:
        role = node.get("role", {}).get("value")
        if role in _NAMED_ROLES and not node.get("ignored"):
            if not node.get("name", {}).get("value"):
                yield f"a {role} has no name"


WIDTHS = (360, 800, 1600)
SCHEMES = ("light", "dark")


def in_each_look(page):
    """Give the page each width and colour scheme in turn; yields the two."""
    for scheme in SCHEMES:
        page.in_colours(scheme)
        for width in WIDTHS:
            page.as_wide_as(width)
            yield width, scheme
