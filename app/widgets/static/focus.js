() => {
  // The element is drawn a moment after the event.
  let tries = 40;
  const seek = () => {
    const found = document.getElementById(__ID__);
    if (found && found.offsetParent) found.focus();
    else if (tries--) setTimeout(seek, 25);
  };
  seek();
}
