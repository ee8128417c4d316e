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
