// Return the visible texts of the page whose contrast with what is behind them is below 4.5:1.
() => {
    const parse = text => { const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number); return [r, g, b, a] }
    const over = (top, bottom) => [0, 1, 2].map(i => top[i] * top[3] + bottom[i] * (1 - top[3])).concat(1)
    const background = element => {
        const layers = []
        for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor))
        return layers.reverse().reduce((bottom, top) => over(top, bottom), [255, 255, 255, 1])
    }
    const luminance = color => {
        const [r, g, b] = color.slice(0, 3).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    }
    const low = []
    for (const element of document.querySelectorAll("body *")) {
        const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("")
        if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue
        const behind = background(element), [a, b] = [over(parse(getComputedStyle(element).color), behind), behind]
            .map(luminance).sort((x, y) => y - x)
        if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${text.slice(0, 30)}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`)
    }
    return low
}
