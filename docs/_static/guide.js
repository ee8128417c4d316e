// Each line of code in a box of its own, for the style sheet: where a line is broken, it goes on further in than it began.
// Pygments closes its marks at the end of a line. The line breaks stay, since the button copies the text.
for (const code of document.querySelectorAll(".cell_input pre, .highlight-python pre, .highlight-bash pre")) {
  const lines = code.innerHTML.replace(/\n$/, "").split("\n");
  code.innerHTML = lines.map(line => `<span class="guide-line">${line}</span>`).join("\n") + "\n";
  for (const line of code.querySelectorAll(".guide-line"))
    line.style.setProperty("--indent", line.textContent.search(/\S|$/) + "ch");
}

// A box that scrolls sideways must be reachable by keyboard; which boxes do depends on the width of the window.
const boxes = ".highlight pre, .table-wrapper, .cell_output .output, div.math";

function reach() {
  for (const box of document.querySelectorAll(boxes)) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

addEventListener("load", reach);
addEventListener("resize", reach);
addEventListener("toggle", reach, true); // a table inside <details> has no width before it is opened
